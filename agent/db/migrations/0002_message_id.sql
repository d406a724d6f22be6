-- The id that a signed webhook carries: a repeated one changes nothing for as long as its delivery is kept.
ALTER TABLE deliveries ADD COLUMN message_id text;
CREATE UNIQUE INDEX deliveries_message ON deliveries (message_id, entity_id) WHERE message_id IS NOT NULL;
