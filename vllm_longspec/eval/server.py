"""A `vllm serve` process, for examples, tests and measurements."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from vllm_longspec.errors import LongSpecError

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED_BY_DEPTH = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass
class Server:
    """A running server. `url` has no trailing slash; `log` holds all it printed."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def metrics(self) -> dict[str, float]:
        return read_metrics(self.url)


@dataclass
class Counters:
    """vLLM's spec-decode counters since the engine's start; both empty without speculation."""

    drafts: int  # verifications
    depths: list[int]  # verifications that accepted a node of depth 1, 2, ...


def read_metrics(url: str) -> dict[str, float]:
    """The samples of a vLLM server's /metrics, summed over their labels; accepted tokens by
    position stand under `vllm:spec_decode_num_accepted_tokens_per_pos_total/<position>`.

    `url` has no trailing slash. Raises OSError where no server answers.
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name
            if "position" in sample.labels:
                name += "/" + sample.labels["position"]
            values[name] = values.get(name, 0.0) + sample.value
    return values


def counters_of(metrics: Mapping[str, float]) -> Counters:
    """From `read_metrics`."""
    prefix = f"{ACCEPTED_BY_DEPTH}_total/"
    positions = sorted(
        int(name.removeprefix(prefix)) for name in metrics if name.startswith(prefix)
    )
    return Counters(
        int(metrics.get(f"{DRAFTS}_total", 0)),
        [int(metrics[f"{prefix}{position}"]) for position in positions],
    )


def idle_counters(url: str, timeout: float = 20.0) -> Counters:
    """A server's counters once it runs no request and they stand still.

    Raises LongSpecError if it is still busy after `timeout` seconds: counters are the whole
    server's, other clients' requests would count as ours.
    """
    deadline = time.monotonic() + timeout
    last = None
    while time.monotonic() < deadline:
        metrics = read_metrics(url)
        counters = counters_of(metrics)
        if metrics.get("vllm:num_requests_running") == 0 and counters == last:
            return counters
        last = counters
        time.sleep(0.2)
    raise LongSpecError(f"url: {url} is serving other requests; measure on a server left alone")


def start_server(model: str, arguments: Sequence[str] = ()) -> Server:
    """Start `vllm serve` on a free port; `wait_until_ready` before its first request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
    with os.fdopen(handle, "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
                "--host", "127.0.0.1", "--port", str(port), *arguments,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return Server(process, f"http://127.0.0.1:{port}", Path(name))


def wait_until_ready(server: Server, timeout: float = 600.0) -> None:
    """Raises RuntimeError with the end of the log if the server exits or needs over `timeout` s."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        time.sleep(0.5)
    stop_server(server)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vllm serve did not start; {server.log} ends with:\n{tail}")


def stop_server(server: Server) -> None:
    if server.process.poll() is None:
        server.process.terminate()
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, 9)
            server.process.wait()


@contextlib.contextmanager
def running_servers(
    *commands: tuple[str, Sequence[str]], timeout: float = 600.0
) -> Iterator[list[Server]]:
    """Servers started side by side, each from (model, arguments); all ready, all stopped after."""
    servers = [start_server(model, arguments) for model, arguments in commands]
    try:
        for server in servers:
            wait_until_ready(server, timeout)
        yield servers
    finally:
        for server in servers:
            stop_server(server)
