"""One page to explore a question about an image: everything in one HTML file.

    prompt = reported_prompt(model, clean, corrupted, constraint="this country")
    write_report("report.html", prompt, trace=trace, contributions=[contribution])

The page opens from the disk without a network: image, numbers, style and script are inside.
"""

from mmlens.plots.report.page import report_page, write_report
from mmlens.plots.report.prompt import ReportedPrompt, reported_prompt

__all__ = ["ReportedPrompt", "report_page", "reported_prompt", "write_report"]
