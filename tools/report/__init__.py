"""Pages of results.

`collect` reads a distillation and `render` draws it; `read_models`, `compare` and `render_comparison` put evaluated
models side by side.
"""

from tools.report.collect import Image, Report, ReportError, Task, collect, render, summary, text_table
from tools.report.comparison import (
    ComparisonError,
    Evaluation,
    Model,
    compare,
    csv_table,
    published_models,
    read_models,
    render_comparison,
    text_comparison,
)  # fmt: skip

__all__ = [
    "ComparisonError", "Evaluation", "Image", "Model", "Report", "ReportError", "Task", "collect", "compare",
    "csv_table", "published_models", "read_models", "render", "render_comparison", "summary", "text_comparison",
    "text_table",
]  # fmt: skip
