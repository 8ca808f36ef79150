"""The drawn world: small pictures of colored shapes, their texts, and a miniature BLIP-2 for them."""
