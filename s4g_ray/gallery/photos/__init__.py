"""Read the photos that users ask about.

photo           Photo: decode one, upright, with its EXIF position; HEIC too
quiet_decoders  what decoders print of damaged photos is kept off standard error
video_frames    frames of a video at even times
decode_ahead    decode photos in threads ahead of the encoder, in batches
turned_views    a photo at several rotations or shifts
encoder_input   InputMaker: the encoder's input of a photo at each turn
encode_ahead    encode batches in threads, while others are decoded and answers are made
"""
