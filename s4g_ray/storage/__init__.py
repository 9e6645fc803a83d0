"""Read and write files: local paths and S3, whole objects and byte ranges, published folders.

The functions take URIs as strings: a local path, `s3://BUCKET/KEY`, or another scheme of fsspec.

files          read, write, list, move and remove: local paths and S3
manifest       published folders: parts, checksums, stamps, versions
part_commits   the finished parts of a job that can resume
byte_ranges    many byte ranges of many files in few reads
parquet        refuse extension types, which may hold pickled objects
s3_settings    StorageConfig, and the environment variables that carry it
s3_retries     which S3 errors are retried, for how long, and the message of a final one
s3_filesystem  s3fs with one retry rule and as few requests as possible

Publish a folder, and read it back:

    part = write_part(folder, "part-00000.parquet", data, rows=512)
    publish(folder, "embeddings", [part], stamp)
    manifest = open_published(folder, "embeddings", stamp)
    data = read_part(folder, manifest.parts[0])
"""
