"""The API's reference as a page without scripts and without foreign hosts, made of its OpenAPI description."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: the API</title><style>
body {{ font: 16px/1.5 system-ui; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }}
code {{ font-family: ui-monospace, monospace }}
td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }}
h2 {{ margin-top: 2.5rem }}</style><h1>{title}: the API</h1>
<p>Bodies are JSON, pictures and packed bits in it base64. For programs: <a href="openapi.json">openapi.json</a>.
"""
_BOUNDS = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "default": "default"}


def reference(app: FastAPI) -> str:
    """Every route with what it takes: names, types, bounds and defaults."""
    said = app.openapi()
    return _HEAD.format(title=html.escape(app.title)) + "\n".join(_routes(said))


def _routes(said: dict[str, Any]) -> Iterator[str]:
    for path, methods in said["paths"].items():
        for method, route in methods.items():
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(route['description'])}"
            if "requestBody" not in route:
                continue
            schema = route["requestBody"]["content"]["application/json"]["schema"]
            yield "<table><tr><th>field<th>what it is"
            for name, field in _resolved(said, schema)["properties"].items():
                yield f"<tr><td><code>{html.escape(name)}</code><td>{html.escape(_field(said, field))}"
            yield "</table>"


def _resolved(said: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema, or the one that it refers to."""
    return said["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _field(said: dict[str, Any], field: dict[str, Any]) -> str:
    """A field in words."""
    kinds = [_resolved(said, kind) for kind in field.get("anyOf", [field])]
    bounds = {name: value for kind in [*kinds, field] for name, value in kind.items() if name in _BOUNDS}
    named = " or ".join(dict.fromkeys(kind.get("type", "anything") for kind in kinds))
    limits = ", ".join(f"{_BOUNDS[name]} {value:g}" for name, value in bounds.items() if value is not None)
    text = next((kind["description"] for kind in [field, *kinds] if "description" in kind), "")
    return "; ".join(part for part in (named, limits, text) if part)
