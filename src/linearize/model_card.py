"""The README.md of an exported student: what it is, how to load it, what was measured."""

from typing import Any

from torch import nn


def model_card(student: nn.Module, pipeline_class: str, *, form: str, summary: dict[str, Any] | None = None) -> str:
    """The model card in Markdown with the metadata block that a model hub reads.

    Args:
        student: The student transformer as it is stored; its plan says which mixers it has.
        pipeline_class: Name of the diffusers pipeline.
        form: "local" or "standalone", for the lines that load it.
        summary: The content of a run's `summary.json`.
    """
    sections = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags:\n- linearize\n- text-to-image\n---",
        "# Student of a linearized Diffusion Transformer",
        f"A `{pipeline_class}` whose `{type(student).__name__}` has mixers of linear cost where its teacher had "
        "softmax attention.",
        "## Load",
        f"```python\n{_loading_lines(student, form)}\n```",
        "## Mixers",
        "\n".join(_plan_lines(student)),
    ]
    if summary is not None:
        sections += ["## Measured", _measurements(summary)]
    return "\n\n".join(sections) + "\n"


def _loading_lines(student: Any, form: str) -> str:
    if form == "standalone":
        return (
            "# where the package linearize is installed\n"
            "import torch\n"
            "from diffusers import DiffusionPipeline\n\n"
            "pipeline = DiffusionPipeline.from_pretrained(\n"
            f'    "<this folder>", dtype={student.dtype}, trust_remote_code=True\n'
            ")"
        )
    return 'from linearize import load_pipeline\n\npipeline = load_pipeline("<this folder>")'


def _plan_lines(student: Any) -> list[str]:
    lines = []
    for rule in student.config.linearize_plan:
        arguments = ", ".join(f"{key}={value}" for key, value in rule["arguments"].items())
        lines.append(f"- `{rule['mixer']}({arguments})` in {len(rule['layers'])} layers: {', '.join(rule['layers'])}")
    return lines


def _measurements(summary: dict[str, Any]) -> str:
    # Whoever has a summary has the packages of the `train` extra; loading a student needs none.
    from linearize.evaluation.tables import MODELS, fact_rows, markdown_table, summary_rows

    return "\n\n".join(
        [
            markdown_table(["", *MODELS], summary_rows(summary)),
            markdown_table(["run", ""], fact_rows(summary)),
            "The teacher's column is against a second seed of its own, the noise floor.",
        ]
    )
