"""Instructions and answers: files of them, their tokens, and how they are learnt."""
