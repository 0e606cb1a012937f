"""Pages of results: of a distillation (`collect.py`), of evaluated models side by side (`comparison.py`), and of models
on one's own prompts (`gallery.py`)."""

from tools.report.collect import Image, Report, ReportError, Task, collect, render, summary, text_table
from tools.report.comparison import compare
from tools.report.evaluated import ComparisonError, Evaluation, Model, published_models, read_models
from tools.report.gallery import Drawn, render_gallery
from tools.report.tables import csv_table, render_comparison, text_comparison

__all__ = [
    "ComparisonError", "Drawn", "Evaluation", "Image", "Model", "Report", "ReportError", "Task", "collect", "compare",
    "csv_table", "published_models", "read_models", "render", "render_comparison", "render_gallery", "summary",
    "text_comparison", "text_table",
]  # fmt: skip
