-- Feedback may name a request by the id its client gave it; only requests that came with one are in the index.
create index request_event_client on request_event (client_request_id, at) where client_request_id is not null;
