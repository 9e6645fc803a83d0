"""An S3 server in a process of its own, for tests and benchmarks: moto, which keeps its objects in memory.

python -m benchmarks.s3_server --host 127.0.0.1 --port 5000 --bucket runs     # serves until it is stopped
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ACCESS_KEY, SECRET_KEY = "S4GEXAMPLEACCESSKEY", "s4g/example+secret/key"  # the server takes any


def environment(endpoint: str) -> dict[str, str]:
    """The standard AWS variables with which a client reaches the server; no file of the user's is read."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def client(endpoint: str, connections: int = 10) -> Any:
    """A plain boto3 client of the server, without retries."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, max_pool_connections=connections),
    )


@contextmanager
def serving(*buckets: str, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Start a server with some buckets and yield its URL; it ends with the block."""
    port = port or free_port()
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            endpoint = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            _wait(endpoint, process)
            for bucket in buckets:
                client(endpoint).create_bucket(Bucket=bucket)
            yield endpoint
        finally:
            process.kill()


def _wait(endpoint: str, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    host, _, port = endpoint.removeprefix("http://").rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the S3 server did not start on {endpoint}; is moto[server] installed?"
                ) from None
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=None, help="a free one, if not given")
    parser.add_argument(
        "--bucket", action="append", default=[], help="to make; may be given several times"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # or the server would outlive this process
    with serving(*arguments.bucket, host=arguments.host, port=arguments.port) as endpoint:
        print(f"S3 at {endpoint}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
