"""The drawn world: small pictures of colored shapes, their texts, and the miniature BLIP-2 trained on them."""
