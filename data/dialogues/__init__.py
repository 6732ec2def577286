"""Records of any known form become dialogues with roles and supervision."""
