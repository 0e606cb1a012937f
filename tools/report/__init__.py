"""Pages of results.

`collect` reads a distillation and `render` draws it; `read_models`, `compare` and `render_comparison` put evaluated
models side by side.
"""

from tools.report.collect import ReportError, collect
from tools.report.comparison import Comparison, compare, published_models
from tools.report.comparison_data import ComparisonError, Evaluation, Model, read_models
from tools.report.comparison_page import render_comparison
from tools.report.comparison_text import csv_table, text_comparison
from tools.report.data import Picture, Report, Task, summary, teacher_folder, text_table
from tools.report.page import render
from tools.report.plots import shares

__all__ = [
    "Comparison",
    "ComparisonError",
    "Evaluation",
    "Model",
    "Picture",
    "Report",
    "ReportError",
    "Task",
    "collect",
    "compare",
    "csv_table",
    "published_models",
    "read_models",
    "render",
    "render_comparison",
    "shares",
    "summary",
    "teacher_folder",
    "text_comparison",
    "text_table",
]
