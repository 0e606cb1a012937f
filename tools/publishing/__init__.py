"""What is published of a trained student: its files, a model card made of what the run and its evaluations hold."""

from tools.publishing.content import PublishError, Student, find_student, publication, run_of
from tools.publishing.public import public
from tools.publishing.upload import check_name, check_token, upload

__all__ = [
    "PublishError",
    "Student",
    "check_name",
    "check_token",
    "find_student",
    "public",
    "publication",
    "run_of",
    "upload",
]
