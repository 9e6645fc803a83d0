"""Files, S3, published folders.

files          read, write, list and remove: local paths and S3
manifest       published folders: parts, checksums, stamps, versions
part_commits   what a resumable job has committed, part by part
byte_ranges    many byte ranges of many files in few reads
parquet        refuses extension types, which may hold pickled objects
s3_settings    StorageConfig and the environment variables that carry it
s3_retries     which S3 errors are retried, how long, and what a final one says
s3_filesystem  s3fs with one retry rule and as few requests as possible
"""
