"""The model card of everything that is saved: the hub's header with its metrics, a table of facts, and opening code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clips.common.escape import LONGEST, for_markdown
from clips.common.page import markdown

TEMPLATE = """---
{{ card_data }}
---
# {{ name }}

{{ about }}

{{ facts }}

## Use

In the directory of this file, with an image of yours:

```python
{{ code }}
```
{% if note %}

{{ note }}
{% endif %}

The metrics of exactly these weights, if they were measured, are in the header of this file.
"""


def result(test_set: str, metric: str, name: str, value: float, **facts: Any) -> EvalResult:
    """Return a metric for a card's header; `facts` are further plain values, such as the number of questions."""
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=test_set,  # results are grouped by it
        dataset_name=test_set,
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        metric_args=facts,
    )


def write_card(
    directory: Path,
    data: ModelCardData,
    *,
    name: str,
    about: str,
    facts: Mapping[str, str],
    code: str,
    note: str = "",
) -> None:
    """Write the model card `directory`/README.md: the header `data`, a description, a table of `facts`, and `code`.

    `name` and `facts` may hold any text, which is escaped; `about` and `note` are Markdown.
    """
    rows = [(for_markdown(fact), for_markdown(text, LONGEST)) for fact, text in facts.items()]
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=for_markdown(name),
        about=about,
        facts=markdown(("", ""), rows),
        code=code,
        note=note,
    )
    card.save(directory / "README.md")
