"""Where unlabelled images come from: folders, tar shards, Parquet, clip-retrieval indexes, lists."""
