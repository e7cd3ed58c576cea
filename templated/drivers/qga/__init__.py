"""The QEMU guest agent (qemu-ga) in place of our own: for guests that have no file of ours."""
