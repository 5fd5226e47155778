"""Starts and stops the gateway: settings in, exit status out."""

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from services.gateway.app import build_app
from services.gateway.gateway import Gateway
from services.gateway.router import Router
from services.gateway.served import served_model
from services.gateway.tally import tell
from shared.config import GatewayConfig
from shared.errors import ConfigError
from shared.http_side import ANY_ADDRESS
from shared.lifecycle import Instance, run
from shared.messages import Kind
from shared.models.source import open_source

BACKLOG = 2048
KEEP_ALIVE_S = 75
TICK_S = 0.5
LAST_WORDS_S = 3
"""For answers that were ended when draining was over, and for clients that do not read them."""


def main(config: GatewayConfig) -> int:
    """Serve until SIGTERM; returns the exit status."""
    return run(serve(config), config)


async def serve(config: GatewayConfig, signals: bool = True) -> None:
    """The whole life of a gateway. Raises ConfigError, ModelError and BusUnavailable before it is READY."""
    async with Instance(Kind.GATEWAY, config, signals) as instance:
        await instance.say("reading the tokenizer")
        source = open_source(config.model)
        model = served_model(source, config.served_model_name)
        await instance.join(source.facts())
        patience = config.no_attention_deadline
        router = Router(instance.bus, instance.members, config.mesh, instance.id, model.digest, patience)
        await router.start()
        gateway = Gateway(config, model, router, instance.telemetry)
        with _listening(config) as listener:
            server = _server(build_app(gateway, config, instance.heartbeat().version), config)
            serving = instance.spawn(server.serve([listener]), "http")
            url = _url(config.host, listener)
            await instance.ready(lambda: {"url": url})
            instance.spawn(tell(instance, gateway.tally), "served")
            await instance.until_stopped()
            server.stop()  # accepts nobody new
            await gateway.drain(config.drain_s)
            await serving
        await router.close()


class _Server(uvicorn.Server):
    """Leaves the signals to the Instance, and sleeps longer than uvicorn's 0.1 s when nobody asks."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Accept nobody new, and end when what runs has ended."""
        self.should_exit = True
        self._stopped.set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), TICK_S)


def _server(app: ASGIApp, config: GatewayConfig) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(config.drain_s) + LAST_WORDS_S,
        )
    )


@contextmanager
def _listening(config: GatewayConfig) -> Generator[socket.socket, None, None]:
    """A listening socket. Raises ConfigError when the address cannot be used."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # The protocol is named, because asyncio turns Nagle's algorithm off only where it sees TCP.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
            listener.listen(BACKLOG)
        except (OSError, OverflowError) as error:
            raise ConfigError("--host, --port", f"cannot listen on {config.host}:{config.port}: {error}") from error
        yield listener


def _url(host: str, listener: socket.socket) -> str:
    name = socket.gethostname() if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
