"""Joining a Ray cluster that runs already: is it there, does it let us in, who lives on which host.

    ray start --head                      on one host
    ray start --address=HEAD:6379         on every other
    RayRuntime(address="auto")            on one of them: the driver

Ray itself tries for 20 s where the token is wrong and for minutes where nobody answers, and says
so once a second. `refuse_stranger` asks first, with the same token, and gives one sentence.
"""

from __future__ import annotations

from typing import Any

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


def place(options: dict[str, Any], spread: bool) -> dict[str, Any]:
    """Ray's options of an actor on a cluster, with the host where it is to live.

    Those that a system can lose and replace are spread over the hosts. The others stay beside the
    driver: a run that outlives them is no longer than the driver's own, and a host that is cut off
    ends it less often. Who asks for a GPU or names a strategy is left to Ray.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if options.get("num_gpus") or "scheduling_strategy" in options or "resources" in options:
        return options
    if spread:
        return {**options, "scheduling_strategy": "SPREAD"}
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=True)
    return {**options, "scheduling_strategy": beside}
