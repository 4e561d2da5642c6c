"""Rows of click logs: read from any format, prepared once, and dealt out as batches.

Each word has one meaning in this package:

- row: one example, that is a label, 13 integers and 26 categories of one or more ids each.
- record: a row as it is stored, a structure of fixed size (`data.schema.Layout`). `records` is a numpy array of them.
- batch: rows as a model takes them (`data.rows.Batch`).
- source: rows in an order, from a file, several files or a folder (`data.sources.Source`).
- line: one entry of a source, counted from 0. It is a row or, in a log, a fault: text that is not a row.
- piece: consecutive lines of a source that one call reads (`data.sources.Piece`).
- shard: a file that was written whole, with rows of one source (`data.formats.writer.Shard`).
- part: the rows for training, validation or test (`data.parts.Part`).
- share: what one of several processes takes on, of a batch, of rows or of sources.
"""
