"""Runs -> pages, tables and model cards; reads files only, and never imports torch."""

from pcdistill.report._folder import read_metrics, read_summary
from pcdistill.report._format import count, term_text
from pcdistill.report.compare_page import write_compare_report
from pcdistill.report.model_card import write_model_card
from pcdistill.report.rows import Failure, Row, aligned, compare_rows, format_table
from pcdistill.report.run_page import write_run_report
from pcdistill.report.speed import FILE as SPEED_FILE
from pcdistill.report.speed import read_speed, speed_cells, speed_notes
from pcdistill.report.strengths import comparison_text
from pcdistill.report.students_page import write_students_report
from pcdistill.report.terminal import terminal_text

__all__ = [
    "SPEED_FILE",
    "Failure",
    "Row",
    "aligned",
    "compare_rows",
    "comparison_text",
    "count",
    "format_table",
    "read_metrics",
    "read_speed",
    "read_summary",
    "speed_cells",
    "speed_notes",
    "term_text",
    "terminal_text",
    "write_compare_report",
    "write_model_card",
    "write_run_report",
    "write_students_report",
]
