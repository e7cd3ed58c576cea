"""A real S3 server on loopback, and a proxy before it that misbehaves when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from templated.model.config import StoreConfig

BUCKET = "code"
_KEY, _SECRET = "templated", "a-secret-of-tests"
_WEED = Path(sys.executable).with_name("weed")
_BOUND = 60.0


class Server:
    """One SeaweedFS with a bucket. `close` ends it and removes its files."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tpw.", dir="/tmp"))
        (self.folder / "data").mkdir()
        self.secret = self.folder / "secret"
        self.secret.write_text(_SECRET)
        self.secret.chmod(0o600)
        credentials = [{"accessKey": _KEY, "secretKey": _SECRET}]
        actions = ["Admin", "Read", "Write", "List"]
        identity = {"name": "tests", "credentials": credentials, "actions": actions}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = _free_ports(8)
        self.port = self._ports[0]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it serves S3."""
        return f"http://127.0.0.1:{self.port}"

    def config(self, *, endpoint: str | None = None, **others: Any) -> StoreConfig:
        """How a daemon is told of it."""
        settings: dict[str, Any] = {
            "url": f"s3://{BUCKET}/functions",
            "endpoint": endpoint or self.url,
            "access_key": _KEY,
            "secret_file": str(self.secret),
        }
        return StoreConfig(**(settings | others))

    def start(self) -> None:
        """Start it, and wait until it has the bucket."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        end = time.monotonic() + _BOUND
        while not self._makes_bucket():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        """What it has written."""
        return (self.folder / "log").read_text(errors="replace")

    def _command(self) -> list[str]:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = map(
            str, self._ports
        )
        return [
            *(str(_WEED), "-logtostderr", "server", f"-dir={self.folder}/data"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *(f"-master.port={master}", f"-master.port.grpc={master_grpc}"),
            *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"),
            *("-volume.max=20", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=0"),
            *("-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"),
            *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0"),
            *("-s3.port.lance=0", "-s3.iam=false"),
            *(f"-s3.config={self.folder}/s3.json", f"-s3.localSocket={self.folder}/s3.sock"),
            f"-filer.localSocket={self.folder}/filer.sock",
        ]

    def _makes_bucket(self) -> bool:
        """Whether it serves, and has the bucket now: the first object makes it."""
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        store = S3Store(
            BUCKET,
            config={
                "endpoint": self.url,
                "region": "us-east-1",
                "access_key_id": _KEY,
                "secret_access_key": _SECRET,
            },
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        try:
            store.put("ready", b"x", use_multipart=False)
        except (BaseError, FileNotFoundError):
            return False
        return True

    def stop(self) -> None:
        """End it; its files stay."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End it, and remove its files, also those that it makes elsewhere."""
        self.stop()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Proxy:
    """Passes a server's answers on; `passed` bytes of each connection, and then no more."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._open: set[asyncio.Task[None]] = set()
        self.passed: int | None = None
        """None: all."""
        self.cuts = False
        """What comes then: the end of the connection, or nothing at all."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen, at the same place each time."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End all connections, and take no new ones."""
        assert self._listener is not None
        self._listener.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        try:
            answers, requests = await asyncio.open_connection("127.0.0.1", self._server.port)
            upwards = asyncio.create_task(_pump(reader, requests))
            try:
                await self._answers(answers, writer)
            finally:
                upwards.cancel()
                requests.close()
        except OSError:
            pass
        finally:
            writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = 0
        while piece := await reader.read(1 << 16):
            if self.passed is not None and count + len(piece) > self.passed:
                writer.write(piece[: max(0, self.passed - count)])
                await writer.drain()
                if not self.cuts:
                    await asyncio.get_running_loop().create_future()
                return
            count += len(piece)
            writer.write(piece)
            await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
