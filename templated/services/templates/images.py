"""The images of this host, and which templates need them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from templated.drivers.image.store import Image, ImageStore
from templated.model.api import ImageView
from templated.services.templates.catalog import Templates


async def image_views(images: ImageStore, templates: Templates) -> list[ImageView]:
    """The complete images, oldest first. Raises nothing: incomplete ones are left out."""
    found = await asyncio.to_thread(_sizes, images)
    needed: dict[str, list[str]] = {}
    for name in templates.built():
        if generation := templates.generation(name):
            needed.setdefault(generation.manifest.image, []).append(name)
    return [_view(image, size, needed.get(image.digest, [])) for image, size in found]


def _sizes(images: ImageStore) -> list[tuple[Image, int]]:
    return [(image, image.disk.stat().st_blocks * 512) for image in images.list()]


def _view(image: Image, size: int, templates: list[str]) -> ImageView:
    return ImageView(
        digest=image.digest,
        suite="" if image.spec.path else image.spec.suite,
        path=image.spec.path,
        packages=image.spec.packages,
        size=size,
        built_at=datetime.fromtimestamp(image.built_at, UTC).isoformat(timespec="seconds"),
        templates=tuple(templates),
    )
