"""`unmix inspect`: what a coder is, told even where loading it is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

from unmix.core.errors import ConfigError

USAGE = """usage: unmix inspect PATH [--json]

PATH is a coder's folder or file, or hf://owner/repo/path. Says its format, shapes, hooks, activation, norms and
health. Opens what `load` refuses, and says why it is refused. --json prints everything.
"""


def command(arguments: list[str]) -> int:
    """Print facts about one coder."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if len(arguments) > 2 or (len(arguments) == 2 and arguments[1] != "--json"):
        raise ConfigError(f"unexpected argument {arguments[-1]!r}; usage: unmix inspect PATH [--json]")
    from unmix.formats.inspection import inspect

    facts = inspect(arguments[0])
    if len(arguments) == 2:
        sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")
    else:
        sys.stdout.write("\n".join(lines(facts)) + "\n")
    return 0


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts in words, one a line."""
    shown = [f"place       {facts['place']}", f"format      {', '.join(facts['formats']) or 'none recognised'}"]
    for file, tensors in facts["tensors"].items():
        for name, tensor in tensors.items():
            what = f"{tensor.get('dtype', '')} {tensor.get('shape', '')}" if isinstance(tensor, dict) else tensor
            shown.append(f"tensor      {file}: {name}  {what}")
    if not facts["loadable"]:
        return [*shown, f"refused     {facts['refused']}"]
    coder = facts["coder"]
    activation = " ".join(f"{key}={value}" for key, value in coder["activation"].items() if key != "kind")
    shown += [
        f"reads       {', '.join(coder['reads'])}",
        f"writes      {', '.join(coder['writes'])}",
        f"sizes       d_in={coder['d_in']} n_latents={coder['n_latents']} d_out={coder['d_out']}",
        f"activation  {coder['activation']['kind']} {activation}".rstrip(),
        f"normalise   {coder['normalise']['kind']}, input × {coder['input_scale']:.6g}, "
        f"output × {coder['output_scale']:.6g}, pre-bias {coder['pre_bias']}, skip {coder['skip']}",
    ]
    if coder.get("model"):
        shown.append(f"model       {coder['model']['name']}")
    for name, value in facts["health"].items():
        text = " ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else f"{value}"
        shown.append(f"health      {name.replace('_', ' ')}: {text}")
    return shown
