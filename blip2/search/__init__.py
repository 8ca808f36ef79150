"""Search in many pictures by a text or a picture.

index_folder(loaded, "pictures")
for found in search(loaded, Index("pictures"), "a red circle", rerank=16): print(found.path, found.score)

vectors.py   what is kept of a picture, and which vectors are nearest
encode.py    pictures to vectors
store.py     an index on the disk, as searches see it
writer.py    an index that grows
index.py     a folder's pictures into an index: the new and the changed
query.py     a text or a picture to pictures; ITM on the best
"""

from blip2.search.index import check_model, index_folder, indexing
from blip2.search.query import Found, search
from blip2.search.store import Index
from blip2.search.vectors import SearchError

__all__ = ["Found", "Index", "SearchError", "check_model", "index_folder", "indexing", "search"]
