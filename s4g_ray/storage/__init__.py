"""Read and write files: local paths and object stores, whole objects and byte ranges, folders.

The functions take URIs as strings: a local path, `s3://BUCKET/KEY`, `gs://BUCKET/KEY`,
`az://CONTAINER/KEY`, or another scheme of fsspec.

files              read, write, list, move and remove: local paths and object stores
manifest           published folders: parts, checksums, stamps, versions
part_commits       the finished parts of a job that can resume
byte_ranges        many byte ranges of many files in few reads
tar_writer         uncompressed tar files of images
parquet            refuse extension types, which may hold pickled objects
s3_settings        StorageConfig, RetryPolicy, and the environment variables that carry them
s3_access          credentials, region and address of S3, by AWS's standards
object_store       the requests to one bucket, by obstore
store_connections  the connections and threads that the buckets of a process share
store_errors       which errors of a store may pass, and the message of a final one
store_filesystem   the object stores of a process as a file system of fsspec
ownership/         one process at a time writes a folder: a lease with a heartbeat

Publish a folder, and read it back:

    part = write_part(folder, "part-00000.parquet", data, rows=512)
    publish(folder, "embeddings", [part], stamp)
    manifest = open_published(folder, "embeddings", stamp)
    data = read_part(folder, manifest.parts[0])
"""
