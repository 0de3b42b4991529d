-- Return the JSON of the newest 100 images, without those that Redis has dropped.
local found = {}
for _, entry in ipairs(redis.call('XREVRANGE', 'faces:images', '+', '-', 'COUNT', 100)) do
  local json = entry[2][2]
  local is_json, image = pcall(cjson.decode, json)
  if is_json and type(image) == 'table' and redis.call('EXISTS', 'faces:image:' .. tostring(image.id)) == 1 then
    table.insert(found, json)
  end
end
return found
