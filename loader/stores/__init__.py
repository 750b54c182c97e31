"""Where artifacts and base models lie. The only network code; foreign errors end here."""
