"""The columns of a list of labelled images that the recipe names."""

from __future__ import annotations

from dataclasses import dataclass

from ktray.errors import KtrayError


@dataclass(frozen=True)
class ListColumns:
    """Names of columns; the case of letters does not matter.

    Attributes:
        label: the column with the label (``task.label``); None: the first of
            `ktray.data.sources.parquet_tables.LABEL_NAMES` that the list has.
        group: the column with the group of each image (``task.group``); None: the column ``group``, if there is one.
    """

    label: str | None = None
    group: str | None = None

    def refuse(self, path: str, what: str) -> None:
        """For data without columns.

        Args:
            what: such data, with an article.

        Raises:
            KtrayError: a column is named.
        """
        for key, column in (("task.label", self.label), ("task.group", self.group)):
            if column is not None:
                raise KtrayError(
                    f"{key}={column} is a column of a CSV or Parquet list, and '{path}' is {what}",
                    f"Remove {key}, or set task.data to a list with this column and the paths of the images.",
                )


USUAL = ListColumns()
