"""The image of python-fn for the lab, made on this host.

In the lab, where every instruction is emulated, it would take five minutes and more. That the image
unit makes one, too, is a test of its own; see test_install.py.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.image import ROOT
from tests.lab.machine import Lab

_MADE_WITHIN = 900.0
_ENDS_WITHIN = 30.0
_IMAGES = "/var/lib/templated/images"


class GuestImage:
    """An image that is being made below `store`."""

    def __init__(self, store: Path, process: subprocess.Popen[bytes]) -> None:
        self._store = store
        self._process = process
        self._digest = ""

    def put(self, lab: Lab) -> None:
        """Wait until it is made, and lay it where the product in the lab looks for it.

        Raises AssertionError when it cannot be made.
        """
        if not self._digest:
            said, _ = self._process.communicate(timeout=_MADE_WITHIN)
            assert self._process.returncode == 0, said.decode(errors="replace")
            self._digest = json.loads(said)["digest"]
        lab.share_at("/mnt")
        lab.do(
            f"install -d -m 700 /var/lib/templated && install -d -m 755 {_IMAGES}"
            f" && cp -r --preserve=mode /mnt/images/{self._digest} {_IMAGES}/ && umount /mnt"
        )


@contextmanager
def guest_image(store: Path, work: Path) -> Iterator[GuestImage]:
    """Begin to make the image of python-fn in a store of the tests, beside what follows."""
    config = work / "templated.yaml"
    places = {"state_dir": str(store), "template_dirs": [str(ROOT / "templates")]}
    config.write_text(json.dumps(places))  # JSON is YAML
    command = [sys.executable, "-m", "templated", "-q", "-o", "json", "image", "build"]
    process = subprocess.Popen(
        # Interrupted when we are killed, so that nothing of it goes on.
        ["setpriv", "--pdeathsig=INT", *command, "python-fn", "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        yield GuestImage(store, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_WITHIN)
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
