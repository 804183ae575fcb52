"""The run page: a run folder becomes one HTML file that opens anywhere, without a network; several runs are compared.

`reading` takes what there is in a run folder, `curves` keeps long records short, `charts` says which charts there are,
`page` and `comparison` put the page together from `parts`, `evaluation` (predictions, confusion matrix) and `attempts`.
`page.css` and the `.js` files are inlined. Imports no torch, and writes nothing but the page.
"""

from trainer.report.curves import Curves
from trainer.report.writing import write_page, write_report

__all__ = ["Curves", "write_page", "write_report"]
