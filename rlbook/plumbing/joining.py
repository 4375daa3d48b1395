"""Joining a Ray cluster that runs already: is it there, does it let us in, who lives on which host.

    ray start --head                      on one host
    ray start --address=HEAD:6379         on every other
    RayRuntime(address="auto")            on one of them: the driver

Ray itself tries for 20 s where the token is wrong and for minutes where nobody answers, and says
so once a second. `refuse_stranger` asks first, with the same token, and gives one sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import psutil

ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The call that costs a cluster's head nothing; without arguments it is no bytes at all."""
TOKEN_HELP = (
    "it wants a token: head, hosts and driver need the same one, in RAY_AUTH_TOKEN with"
    " RAY_AUTH_MODE=token or in ~/.ray/auth_token (`ray get-auth-token --generate` makes one)"
)


def head_of(address: str) -> str | None:
    """HOST:PORT of the cluster's head; None where Ray alone may find it.

    ``ValueError`` for an address of Ray's client, which is another kind of driver.
    """
    from ray._private import services

    if "://" in address:
        raise ValueError(
            f"ray_address: got {address!r}; run the driver on a host of the cluster, with 'auto' or"
            " 'HOST:PORT' of its head"
        )
    return services.canonicalize_bootstrap_address(address)


def refuse_stranger(address: str, timeout_s: float = 5.0) -> None:
    """Asks the head at ``address`` (or "auto") whether it lives and takes our token.

    ``ConnectionError`` within about ``timeout_s`` seconds if it does not.
    """
    import grpc
    from ray import _raylet

    head = head_of(address)
    if head is None:
        return
    tokens: Any = getattr(_raylet, "AuthenticationTokenLoader", None)  # older Rays know no tokens
    known = tokens is not None and tokens.instance().has_token(ignore_auth_mode=True)
    token = tokens.instance().get_token_for_http_header(ignore_auth_mode=True) if known else {}
    with grpc.insecure_channel(head, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=timeout_s, metadata=tuple(token.items()))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConnectionError(f"ray_address: {head} lets nobody in: {TOKEN_HELP}") from None
            raise ConnectionError(
                f"ray_address: no Ray cluster answers at {head}: is `ray start --head` running"
                " there, and is its port open?"
            ) from None


def hosts_of() -> list[tuple[int, float, int]]:
    """(cores, GiB of memory, GPUs) that each host of the cluster gives to Ray."""
    import ray

    has = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [
        (int(one.get("CPU", 0)), one.get("memory", 0.0) / 2**30, int(one.get("GPU", 0)))
        for one in has
        if one.get("CPU", 0) >= 1
    ]


def interface_of(address: str) -> str:
    """The name of this computer's network interface with an address. gloo would take the one that
    the host's own name leads to, which others may not reach (127.0.1.1 on many a Debian).

    ``OSError`` if no interface has it.
    """
    for name, has in psutil.net_if_addrs().items():
        if any(one.address == address for one in has):
            return name
    raise OSError(f"none of this computer's network interfaces has the address {address}")


class Places:
    """On which host of the cluster the next actor lives; the driver's own is where this runs.

    Those that a system can lose and replace are spread: each goes where a core has fewest of them.
    The others stay beside the driver, so that a host that is cut off does not end the run. Both
    only if there is room. Who asks for a GPU or names a strategy is left to Ray.
    """

    def __init__(self) -> None:
        self.spread: Counter[str] = Counter()
        """Id of a host → how many were spread to it so far."""

    def next(self, options: Mapping[str, Any], spread: bool) -> dict[str, Any]:
        """What to add to Ray's ``options`` of an actor that is about to be made."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if options.get("num_gpus") or {"scheduling_strategy", "resources"} & set(options):
            return {}
        host = here = ray.get_runtime_context().get_node_id()
        if spread:
            hosts = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            load = {
                name: ((1 + self.spread[name]) / has["CPU"], name == here)
                for name, has in hosts.items()
                if has.get("CPU")
            }
            host = min(load, key=lambda name: load[name], default=here)
            self.spread[host] += 1
        where = NodeAffinitySchedulingStrategy(host, soft=True, _spill_on_unavailable=True)
        return {"scheduling_strategy": where}
