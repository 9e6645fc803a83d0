"""Embed a collection: parts in place order, encoded block by block by actors that stay warm.

part_plan      which rows make which part of a table, and the blocks that actors take
decode_ahead   read and decode a block's images ahead of the encoder, within a limit of bytes
outcomes       what was written of a block and of a part, as it is committed
block_encoder  encode blocks and join them to parts: what an actor does, without Ray
block_queue    which actor does what next, and what a dead actor had
"""
