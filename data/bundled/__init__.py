"""The generator of dummy_conversation.json, the dialogues of the main job."""
