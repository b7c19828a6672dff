"""What each verb does, apart from how a command line spells it and how a terminal shows it."""
