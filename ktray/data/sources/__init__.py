"""Sources of unlabelled images. Each has its own file: ``files`` (folders of images), ``csv_lists``, ``tars``,
``parquets`` and ``clip_retrieval``.

``base`` defines what a source must provide. The other files are used for all sources: ``listing`` (paths to shards),
``lists`` (``gallery.data`` and ``transfer.list``), ``shards`` and ``fetch`` (reading), ``uris`` and ``records``.
"""
