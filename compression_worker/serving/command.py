"""``python -m compression_worker serve``: following the pointer in a database, or standing alone with folders.

torch is imported only once the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_worker.contracts import CompressionError, Json

if TYPE_CHECKING:
    from compression_worker.serving.variants import Variants

DSN_VARIABLE = "DELTAWORKS_SERVER_DSN"
GRACE_SECONDS = 5

logger = logging.getLogger(__name__)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``serve``."""
    parser.add_argument("--store", metavar="ROOT", help="the store to load from: a folder or s3://bucket/prefix")
    parser.add_argument(
        "--cache",
        default=os.environ.get("ARTIFACT_CACHE", ""),
        metavar="FOLDER",
        help="local copies of a bucket's blobs (default: $ARTIFACT_CACHE, or below the home folder)",
    )
    parser.add_argument(
        "--environment",
        action="append",
        default=[],
        metavar="NAME",
        help="an environment to answer for (repeat for more; default: all)",
    )
    parser.add_argument("--name", default="", help="how this server calls itself in its reports (default: host-port)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="the port to listen on, 0 for a free one (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"], help="where models run")
    parser.add_argument("--answers", type=int, default=2, help="answers computed at once (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait for one (default: %(default)s)")
    parser.add_argument("--base", metavar="DIR", help="without a database: the base, a Hugging Face folder")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=ARTIFACT",
        help="without a database: an artifact folder that answers as NAME (repeat for more); a difference needs --base",
    )


def serve_command(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Returns the exit status; raises :class:`CompressionError`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    check_arguments(args)
    with bound(args.host, args.port) as listener:
        return alone(args, listener) if without_database(args) else following(args, listener)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if without_database(args):
        if args.store or args.environment:
            raise CompressionError("usage", "--base and --variant stand alone: leave out --store and --environment")
        variant_folders(args.variant)
    elif not args.store:
        raise CompressionError(
            "usage", "give --store ROOT to follow a database, or --base DIR or --variant NAME=ARTIFACT to stand alone"
        )
    elif not os.environ.get(DSN_VARIABLE):
        raise CompressionError("usage", f"{DSN_VARIABLE} is not set: it says how the pointer's database is reached")


def without_database(args: argparse.Namespace) -> bool:
    """Whether folders are served, and no pointer is followed."""
    return bool(args.base or args.variant)


def variant_folders(given: list[str]) -> dict[str, Path]:
    """``NAME=ARTIFACT`` flags as name -> folder."""
    found: dict[str, Path] = {}
    for flag in given:
        name, equals, folder = flag.partition("=")
        if not (name and equals and folder) or name in found:
            raise CompressionError("usage", f"'{flag}' is not NAME=ARTIFACT with a name of its own")
        found[name] = Path(folder)
    return found


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket: a port that is taken is known before anything is loaded. It listens once there is an app."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = f"cannot listen on {host}:{port}: {error}; choose another --port"
            raise CompressionError("no_port", reason) from error
        yield listener


def following(args: argparse.Namespace, listener: socket.socket) -> int:
    """Serve what the pointers of the named environments say."""
    from compression_worker.serving.follower import Follower, Identity
    from compression_worker.serving.loading import Loader
    from compression_worker.serving.switch import Switch
    from compression_worker.serving.variants import Variants
    from compression_worker.store import open_store

    variants = Variants()
    loader = Loader(open_store(args.store, args.cache), device=_device(args.device))
    host, port = listener.getsockname()[:2]
    follower = Follower(
        dsn=os.environ[DSN_VARIABLE],
        identity=Identity(server=args.name or f"{socket.gethostname()}-{port}", address=f"http://{host}:{port}"),
        environments=args.environment,
        variants=variants,
        make_switch=lambda environment, changed: Switch(environment, variants, loader, changed),
    )

    def readiness() -> tuple[bool, Json]:
        environments = {status.environment: vars(status) for status in follower.statuses()}
        return follower.ready, {"stale": follower.stale, "environments": environments}

    follower.start()
    try:
        return run(args, listener, variants, readiness)
    finally:
        follower.stop()


def alone(args: argparse.Namespace, listener: socket.socket) -> int:
    """Serve each artifact under the name it was given, and a base, where one is given, under its folder's name."""
    import tempfile

    from compression_worker.serving.standalone import load_folders
    from compression_worker.serving.variants import Variants

    variants = Variants()
    with tempfile.TemporaryDirectory(prefix="deltaworks-serve-") as scratch:
        load_folders(
            variants,
            Path(args.base) if args.base else None,
            variant_folders(args.variant),
            scratch=Path(scratch),
            device=_device(args.device),
        )
        return run(args, listener, variants, lambda: (True, {"stale": False, "environments": {}}))


def run(
    args: argparse.Namespace,
    listener: socket.socket,
    variants: Variants,
    readiness: Callable[[], tuple[bool, Json]],
) -> int:
    """Answer until SIGTERM or SIGINT; running answers get a few seconds to end. SIGUSR1 rolls back on the spot."""
    import uvicorn

    from compression_worker.serving.app import create_app
    from compression_worker.serving.engine import Engine

    engine = Engine(variants, answers=args.answers, queue=args.queue)
    config = uvicorn.Config(
        create_app(variants, engine, readiness),
        log_level="warning",
        lifespan="off",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    # uvicorn ends in order and then raises the signal again: as an exit, so that what is below is still cleaned up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    signal.signal(signal.SIGUSR1, lambda number, frame: threading.Thread(target=break_glass, args=(variants,)).start())
    logger.info("listening on http://%s:%d/v1", *listener.getsockname()[:2])
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        logger.info("stopped by hand")
    finally:
        engine.close()
    return 0


def break_glass(variants: Variants) -> None:
    """Full precision for every compressed model, now and without a database, until the next generation."""
    for handle in variants.handles():
        if handle.fallback and variants.swap(
            handle.fallen_back("rolled back on the server, by SIGUSR1"), only_from=handle
        ):
            logger.error("%s: rolled back on the spot by SIGUSR1", handle.environment)


def _device(asked: str) -> Any:
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
