"""Everything that depends on the pinned Flower release (1.39); a later move should cost this file only."""

from __future__ import annotations

import re
import sys
from logging import getLogger
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity

from bayesfed.foreign import plain_text
from bayesfed.host import cores, look_as

CLIENT_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
AWAY = (
    3,
    4,
    5,
)  # ... .MESSAGE_UNAVAILABLE, REPLY_MESSAGE_UNAVAILABLE, NODE_UNAVAILABLE: the SuperLink speaks for a node


def set_identity() -> None:
    """Let this process create messages: outside Flower's engine 1.39 knows no task identity."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def node_context(node: int, partition: int, num_partitions: int) -> Context:
    """The context of a simulated node."""
    config: dict[str, Any] = {"partition-id": partition, "num-partitions": num_partitions}
    return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})


def error_reply(message: Message, error: BaseException | str) -> Message:
    """An error reply as Flower sends one when a ClientApp raises: ``Kind: text`` of an exception, or a text."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Message(Error(code=CLIENT_RAISED, reason=text), reply_to=message)


def reason(reply: Message) -> str:
    """Why there is an error reply, as one printable line: a stranger's text, which comes in here and nowhere else.

    Flower's own form, ``<class 'package.Kind'>:<'text'>``, is what is sent if a ClientApp's code can't be run at all.
    """
    text = reply.error.reason or f"error {reply.error.code}"
    if kind := re.match(r"<class '(?:\w{1,99}\.){0,9}(\w{1,99})'>:<'", text):
        text = f"{kind[1]}: " + text[kind.end() :].removesuffix("'>")
    return plain_text(text)


def raised(reply: Message, kind: type[Exception]) -> bool:
    """Whether an error reply is about an exception ``kind`` in the ClientApp: all that travels is its text."""
    return reply.error.code == CLIENT_RAISED and reason(reply).startswith(f"{kind.__name__}: ")


def simulate(server: ServerApp, client: ClientApp, num_nodes: int, resources: dict[str, Any]) -> None:
    """Run both apps on Flower's simulation runtime (its successor ``flwr run`` wants an app bundle and a SuperLink)."""
    from flwr.simulation import run_simulation

    getLogger("flwr").addFilter(lambda record: "DEPRECATED FEATURE" not in record.getMessage())  # nothing a user can do
    path = list(sys.path)

    def placed(message: Message, context: Context) -> Message:
        look_as(path)
        return client(message, context)

    backend = {"client_resources": resources, "init_args": {"num_cpus": cores()}}
    run_simulation(server, cast(ClientApp, placed), num_nodes, backend_config=backend)
