-- Return the JSON of the newest 100 images, without those that Redis has dropped.
local jobs, starts, bytes, queue, stream, errors, photo_key, prefix = unpack(KEYS)
local found = {}
for _, entry in ipairs(redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 100)) do
  local json = entry[2][2]
  local is_json, image = pcall(cjson.decode, json)
  if is_json and type(image) == 'table' and redis.call('EXISTS', prefix .. tostring(image.id)) == 1 then
    table.insert(found, json)
  end
end
return found
