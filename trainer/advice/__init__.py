"""What a run should change to be faster: rules over what was measured, each with what following it gains."""
