"""Where unlabelled images come from, one file for each kind of place: ``files`` (folders of images), ``csv_lists``,
``tars``, ``parquets``, ``clip_retrieval``.

``base`` says what such a source is. The other files serve all sources: ``listing`` (paths to shards), ``lists``
(``gallery.data`` and ``transfer.list``), ``shards`` and ``fetch`` (reading), ``uris`` and ``records``.
"""
