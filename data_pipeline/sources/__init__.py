"""Sources: the inputs of a corpus as units of work, and the records of each unit.

    units.py        what an input and a unit are; listing them; to add a kind, add a file and its line there
    webdataset.py   samples of a tar            img2dataset.py  the same with its json and parquet
    parquet.py      rows with image bytes, or with names of pictures that `named.py` finds
    folder.py       pictures with captions beside them, or in a jsonl
    files.py        one file of an input, here or elsewhere (`remote.py`)    compression.py  bounded unpacking
    fields.py       captions and numbers of json objects and of Arrow columns

Called by the corpus builder.
"""

from data_pipeline.sources.units import Input, Kind, Unit, list_units, read_records, reopen

__all__ = ["Input", "Kind", "Unit", "list_units", "read_records", "reopen"]
