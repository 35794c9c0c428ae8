"""`finetune doctor`."""

from __future__ import annotations

from typing import Any

from finetune.cli.output import AsJson, print_json, print_text


def doctor_command(as_json: AsJson = False) -> None:
    """Show devices, bf16 support, versions, and the data and models at hand."""
    found = examine()
    if as_json:
        print_json(found)
        return
    for section, facts in found.items():
        print_text(section)
        for name, value in facts.items():
            print_text(f"  {name:42} {value}")


def examine() -> dict[str, dict[str, Any]]:
    """Look at what this machine has: section -> fact -> value."""
    import psutil
    import torch

    from finetune.artifact.run_folder import describe_host
    from finetune.data.catalog import describe_location, list_cards
    from finetune.errors import ModelError
    from finetune.models.base import WHEELS, find_base
    from finetune.training.precision import choose_precision, measure_bf16_ratio

    host, memory = describe_host(), psutil.virtual_memory()
    devices = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    bases = {}
    for reference in WHEELS:
        try:
            base = find_base(reference)
            bases[reference] = base.origin if base else "not at hand; would be downloaded from the Hub"
        except ModelError as error:
            bases[reference] = str(error)
    return {
        "machine": {
            "system": host["system"],
            "python": host["python"],
            "cores": f"{host['cores']}, torch uses {torch.get_num_threads()}",
            "memory": f"{memory.total / 2**30:.1f} GB, {memory.available / 2**30:.1f} free",
        },
        "devices": devices or {"cpu": torch.backends.cpu.get_cpu_capability()},
        "precision": {
            "bf16 over float32 on this CPU": f"{measure_bf16_ratio():.2f} times as fast",
            "`precision: auto` means": choose_precision("auto"),
        },
        "versions": host["versions"],
        "base models": bases,
        "data": {card.name: describe_location(card) for card in list_cards()},
    }
