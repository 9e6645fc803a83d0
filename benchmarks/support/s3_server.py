"""Serve S3 from a separate process, for tests and benchmarks: moto keeps its objects in memory.

    python -m benchmarks.support.s3_server --host 127.0.0.1 --port 5000 --bucket runs

It serves until it is stopped.
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

# the server accepts any keys
ACCESS_KEY = "S4GEXAMPLEACCESSKEY"
SECRET_KEY = "s4g/example+secret/key"


def environment(endpoint: str) -> dict[str, str]:
    """Return the AWS variables by which a client finds the server and reads no file of the user."""
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
    """Find a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def client(endpoint: str, connections: int = 10) -> Any:
    """Make a plain boto3 client of the server, without retries."""
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
    """Start a server with these buckets and yield its URL; stop it at the end of the block."""
    port = port or free_port()
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            reachable_host = "127.0.0.1" if host == "0.0.0.0" else host
            endpoint = f"http://{reachable_host}:{port}"
            _wait_until_up(endpoint, process)
            for bucket in buckets:
                client(endpoint).create_bucket(Bucket=bucket)
            yield endpoint
        finally:
            process.kill()


def _wait_until_up(endpoint: str, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
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
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=None, help="a free port, if not given")
    parser.add_argument(
        "--bucket",
        action="append",
        default=[],
        help="a bucket to create; may be given several times",
    )
    arguments = parser.parse_args()
    # without a handler the server would outlive this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with serving(*arguments.bucket, host=arguments.host, port=arguments.port) as endpoint:
        print(f"S3 at {endpoint}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
