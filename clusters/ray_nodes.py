"""Asks a cluster's dashboard, by HTTP, which nodes it has."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple


class Node(NamedTuple):
    """One Ray node."""

    node_id: str
    ip: str
    alive: bool


def nodes(dashboard_url: str, token_file: Path, timeout_s: float = 10) -> list[Node] | None:
    """Returns the cluster's nodes, dead ones too; None if the dashboard does not answer."""
    request = urllib.request.Request(
        f"{dashboard_url}/api/v0/nodes?limit=10000",
        headers={"Authorization": f"Bearer {token_file.read_text()}"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this machine
    try:
        with direct.open(request, timeout=timeout_s) as response:
            found = json.load(response)["data"]["result"]["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [Node(node["node_id"], node["node_ip"], node["state"] == "ALIVE") for node in found]
