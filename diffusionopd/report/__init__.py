"""The report of a distillation: `collect` reads a run and its evaluations, `summary` and `render` are pure."""

from diffusionopd.report.collect import ReportError, collect
from diffusionopd.report.data import Picture, Report, Task, summary, teacher_folder, text_table
from diffusionopd.report.page import render

__all__ = ["Picture", "Report", "ReportError", "Task", "collect", "render", "summary", "teacher_folder", "text_table"]
