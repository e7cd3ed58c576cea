"""One lab for all tests here, with the product installed as the guide says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guestimage import GuestImage, guest_image
from tests.lab.image import obtain
from tests.lab.machine import Lab
from tests.lab.product import Product
from tests.real.conftest import image_store  # a fixture

__all__ = ["image_store"]


@pytest.fixture(scope="session")
def image(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestImage]:
    """The image of python-fn, being made on this host while the lab boots."""
    if os.geteuid() != 0:
        pytest.skip("only root makes the lab's image")
    with guest_image(image_store, tmp_path_factory.mktemp("image")) as image:
        yield image


@pytest.fixture(scope="session")
def lab(image: GuestImage, image_store: Path) -> Iterator[Lab]:
    """The lab, booted, with this checkout and an image in it."""
    with Lab(obtain(), share=image_store) as lab:
        _furnish(lab, image)
        yield lab


def _furnish(lab: Lab, image: GuestImage) -> None:
    lab.put_checkout()
    image.put(lab)


@pytest.fixture(scope="session")
def product(lab: Lab, image: GuestImage) -> Iterator[Product]:
    """The product, installed by the commands of the operator's guide; see test_install.py.

    When that fails the lab is booted afresh, for the second try of the test that asked for it.
    """
    product = Product(lab)
    try:
        product.install()
    except AssertionError:
        lab.renew()
        _furnish(lab, image)
        raise
    yield product
    product.commands.close()


@pytest.fixture
def host(product: Product) -> Iterator[Product]:
    """The product as it was installed: its default configuration, a template built, no clones.

    Whatever a test leaves is removed.
    """
    product.settle()
    yield product
    product.cli("rm", "--all", "--yes")
