"""Embed a collection: parts in place order, encoded block by block by actors that stay warm.

part_plan       divide rows into parts in the order of places, and parts into blocks
table_plan      choose the rows of a table from the splits of a data set
decode_ahead    read and decode images ahead of the encoder, within a limit of bytes
encode_batches  run the encoder over batches, copies to a GPU beside its passes
outcomes        what actors are told of a job, and what they have written, as it is committed
block_encoder   encode blocks and join them to parts: what an actor does, without Ray
block_queue     the order of work, and what becomes of it when an actor dies
encode_here     a whole job in this process, for few images
report          EmbeddingReport: counts and speed of a job
"""
